"""What sets the model families apart: conditions, call, patches, attention."""
