"""Runs an SGLang engine on what a JSON file asks for, in a process of its own, since SGLang spawns more.

The file holds `engine`, the arguments of `sglang.Engine`, and `batches`, each a list of requests with `prompt`,
`images` (paths) and `tokens`, how many to generate. The answers replace the file's content.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run(spec: dict[str, Any]) -> list[list[dict[str, Any]]]:
    import sglang

    engine = sglang.Engine(
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        page_size=1,
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        skip_server_warmup=True,
        decode_log_interval=1,
        log_level="info",
        **spec["engine"],
    )

    batches = []
    for requests in spec["batches"]:
        outputs = engine.generate(
            [request["prompt"] for request in requests],
            [{"temperature": 0, "max_new_tokens": request["tokens"], "ignore_eos": True} for request in requests],
            image_data=[request["images"] or None for request in requests],
        )
        answers = [
            {"tokens": list(output["output_ids"]), "prompt_tokens": output["meta_info"]["prompt_tokens"]}
            for output in outputs
        ]
        batches.append(answers)
    engine.shutdown()
    return batches


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(json.dumps(run(json.loads(file.read_text()))))
