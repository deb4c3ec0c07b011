"""The playground: a page in the browser on which a model is asked, trimmed and untrimmed.

`state` is what runs and is remembered, `visitor` who asked last, `words` what the page says of it; `page` lays it out
with Gradio, and `serving` puts it on an address. Only the last two need the extra `play`.
"""
