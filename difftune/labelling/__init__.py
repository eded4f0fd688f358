"""A person's choices between pictures: which are shown together, the formats of label files (read and written here
alone), and the web page.
"""
