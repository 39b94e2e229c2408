"""Jobs, workers and engines: who runs what, in which process, and how each job ends."""
