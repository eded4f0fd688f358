"""Reading and writing: whole files and folders, pictures, prompts, checkpoints."""
