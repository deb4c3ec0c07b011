"""Asking a model about pictures: loading, answering, many questions about one picture."""
