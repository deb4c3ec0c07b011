"""Files of questions and of results."""
