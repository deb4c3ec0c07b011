"""SGLang's external model package: `SGLANG_EXTERNAL_MODEL_PACKAGE=crosstrim.engines.sglang`.

SGLang imports every module here and takes `EntryClass` of `model` in place of its own Mllama. Only `model` needs
SGLang to be imported.
"""
