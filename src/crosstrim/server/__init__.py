"""An OpenAI-compatible server: one model, dynamic batches, one trim per request."""
