"""Model card of an exported model, filled from its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_modules.inference.description import ModelDescription
from lightning_modules.inference.loading import ModelFiles

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [video, egocentric, exo2ego]
---

# Exo2Ego, {stage}

Answers questions about egocentric video. Trained with an independent implementation of
[Exo2Ego](https://arxiv.org/abs/2503.09143) (AAAI 2026).

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
video = {{"type": "video", "path": "kitchen.mp4", "start": 3.0, "end": 8.0}}
question = {{"type": "text", "text": "Describe the video."}}
inputs = processor.apply_chat_template([{{"role": "user", "content": [video, question]}}])
print(processor.post_process_image_text_to_text(model.generate(**inputs)))
```

This needs transformers, open_clip_torch, timm and av. A clip is seen as {frames} frames of {size} x {size} pixels.

## Training

| | |
|---|---|
| stage | {stage} |
| steps | {step} |
| configuration | {config_hash} |
| data | {data} |
| parts | {parts} |
| language model | {language_model} |
| code | {code} |

## Scores

{scores}

## Licences

The code is Apache-2.0. The weights are derived from the data and the weights that the run started from, whose licences
apply: name them here before you publish.
"""


def model_card(description: ModelDescription, files: ModelFiles) -> str:
    """Return the model card in Markdown; scores come from the run's validation, with the number of clips."""
    manifest = files.manifest
    return _CARD.format(
        stage=manifest.get("stage", "unknown"),
        frames=description.clips.num_frames,
        size=description.clips.image_size,
        step=manifest.get("step", "unknown"),
        config_hash=manifest.get("config_hash", "unknown"),
        data=manifest.get("data_fingerprint") or "unknown",
        parts=", ".join(description.parts),
        language_model=description.network.language_model.architecture,
        code=manifest.get("code_version", "unknown"),
        scores=_scores(Path(files.where).parent / "metrics.json"),
    )


def _scores(file: Path) -> str:
    if not file.is_file():
        return "Not evaluated."
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    chance = results.get("chance", {})
    lines = [
        f"On {results['clips']} validation clips:",
        "",
        "| score | value | chance |",
        "|---|---:|---:|",
    ]
    for name, value in sorted(results["metrics"].items()):
        guess = chance.get(name.partition("_")[2])
        lines.append(f"| {name} | {value:.4f} | {'' if guess is None else f'{guess:.4f}'} |")
    return "\n".join(lines)
