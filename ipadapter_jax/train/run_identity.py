"""What a resumed run must share with the run before it."""

from collections.abc import Mapping
from dataclasses import dataclass

from ipadapter_jax.runtime.random_keys import GENERATOR, recorded_generator
from ipadapter_jax.storage.config_diff import diff_configs
from ipadapter_jax.train.batches import FrozenModels
from ipadapter_jax.train.checksums import tree_checksums, tree_fingerprint
from ipadapter_jax.train.config import Train, identity
from ipadapter_jax.train.dataset import Samples


@dataclass(frozen=True)
class RunIdentity:
    """Settings, data, frozen weights and random generator of a run, as its checkpoints record them."""

    settings: Mapping[str, object]
    data: Mapping[str, object]
    frozen_weights: Mapping[str, str]  # a fingerprint by part
    variation: Mapping[str, str]  # of an experiment, which trains something else than an IP-Adapter

    def to_json(self) -> dict[str, object]:
        return {
            "settings": self.settings,
            "data": self.data,
            "frozen weights": self.frozen_weights,
            "generator": GENERATOR,
            **self.variation,
        }

    def changes_since(self, recorded: Mapping[str, object]) -> list[str]:
        """The differences from what an earlier start of the run recorded, one string each."""
        return diff_configs({**recorded, "generator": recorded_generator(recorded)}, self.to_json())


def run_identity(
    config: Train, samples: Samples, frozen: FrozenModels, variation: Mapping[str, str] | None = None
) -> RunIdentity:
    """The identity of a run. All processes of the run call this together."""
    weights = {name: tree_fingerprint(tree_checksums(tree)) for name, tree in frozen.by_name().items()}
    return RunIdentity(identity(config), samples.identity(), weights, variation or {})
