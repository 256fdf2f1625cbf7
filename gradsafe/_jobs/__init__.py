"""Jobs: configurations whose `run` reads files, distributes work, resumes and returns a result."""
