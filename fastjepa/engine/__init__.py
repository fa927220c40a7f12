"""How a step is carried out: plain PyTorch, or DeepSpeed ZeRO, which no other room knows, behind the same interface."""
