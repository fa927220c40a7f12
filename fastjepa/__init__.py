"""fastjepa: a performance-focused, kernel-optimised trainer for I-JEPA (Assran et al., CVPR 2023, arXiv 2301.08243)."""

__version__ = "0.1.0"
