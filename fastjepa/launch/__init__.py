"""How the processes of a run were started and find one another."""
