"""Many questions, on one machine or on Ray."""
