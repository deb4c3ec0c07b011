"""The model at work for many: batch jobs and a server, in one process or on a Ray cluster."""
