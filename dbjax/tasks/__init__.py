"""The tasks: what is noised, what conditions it, the loss, the answer, its metric."""
