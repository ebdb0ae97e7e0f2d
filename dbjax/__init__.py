"""dbjax: DiffusionBlocks (arXiv 2506.14202) in JAX.

A network of L layers is cut into B blocks; each is trained alone, as a diffusion
denoiser for its own interval of noise. Block b after n steps is a pure function of
(config, b, n).

Data flows one way: schedule -> denoiser -> tasks -> block -> train -> main.
"""

__version__ = "0.1.0"
