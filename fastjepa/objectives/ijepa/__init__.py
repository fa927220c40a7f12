"""I-JEPA (Assran et al. 2023): predict the target encoder's representations of masked blocks."""
