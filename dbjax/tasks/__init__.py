"""The tasks that come with dbjax, one file each: see `dbjax/task.py` for what a task is."""
