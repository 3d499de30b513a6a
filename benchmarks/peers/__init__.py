"""Other projects' quantizers on the same checkpoints, each in an environment of its own."""
