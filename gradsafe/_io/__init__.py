"""Files and processes: what the methods and the jobs share, and nothing of a method."""
