"""Decide which keys of a run's configuration may differ when it is resumed."""

import pytest
import yaml

from lightning_modules.config import ConfigError
from lightning_modules.resume import check_resumable


def config(micro_batch_size: int, weight: float | None) -> dict:
    model = {} if weight is None else {"contrastive": {"weight": weight}}
    return {"model": {"init_args": model}, "data": {"init_args": {"micro_batch_size": micro_batch_size}}}


@pytest.mark.parametrize("weight", [None, 0.0, 0.5])
def test_the_split_of_a_batch_may_change_unless_the_contrastive_loss_depends_on_it(tmp_path, weight):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(2, weight)))
    check_resumable(tmp_path, config(2, weight), "interrupted")
    if weight:
        with pytest.raises(ConfigError, match=r"different configuration \(data.init_args.micro_batch_size: 2 -> 4\)"):
            check_resumable(tmp_path, config(4, weight), "interrupted")
    else:
        check_resumable(tmp_path, config(4, weight), "interrupted")
