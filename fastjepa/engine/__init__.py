"""Carries out the steps of a run: plain PyTorch, or DeepSpeed ZeRO, which no other room knows, behind one interface."""
