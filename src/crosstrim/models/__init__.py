"""One file per architecture: where its layers are and what its tensors look like."""
