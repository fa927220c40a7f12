"""Starting a run: the launcher's environment, the rendezvous of the ranks, and what must be equal on all of them."""
