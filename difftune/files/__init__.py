"""Reading and writing, whatever is written: whole files and folders, locks, pictures, prompts, checkpoints."""
