"""A person's choices between pictures: the tasks, the label file, the web page."""
