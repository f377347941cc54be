"""Compose the configs of many jobs fast: most choose the same files and differ in a value."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from regrow.config.hydra_access import typed_overrides


@dataclass
class Composed:
    """Like `load_sweep_config` of Hydra's loader, but ten times as fast from the second job on.

    The chosen options alone determine a config's files. Jobs with the same choices share that work
    (0.1 s); other values are then set as the loader sets them.
    """

    loader: ConfigLoader
    config: DictConfig  # the sweep's
    _of_choices: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)
    _is_group: dict[str, bool] = field(default_factory=dict)

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        parsed = OverridesParser.create(config_loader=self.loader).parse_overrides([*overrides])
        values = [override for override in parsed if self._is_value(override)]
        others = [override for override in parsed if override not in values]
        if not all(self._is_choice(override) for override in others):
            return self.loader.load_sweep_config(self.config, [*overrides])
        choices = tuple(str(override.input_line) for override in others)
        if choices not in self._of_choices:
            composed = self.loader.load_sweep_config(self.config, [*choices])
            self._of_choices[choices] = composed
        cfg = copy.deepcopy(self._of_choices[choices])
        try:
            for override in values:
                OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:  # let the loader raise its own error
            return self.loader.load_sweep_config(self.config, [*overrides])
        cfg.hydra.overrides.task = [*overrides]
        if not OmegaConf.is_interpolation(cfg.hydra.job, "override_dirname"):  # Hydra 1.3
            how = cfg.hydra.job.config.override_dirname
            lines = [str(o.input_line) for o in parsed if o.key_or_group not in how.exclude_keys]
            name = how.item_sep.join(sorted(lines)).replace("=", how.kv_sep)
            cfg.hydra.job.override_dirname = name
        return cfg

    def _is_value(self, override: Override) -> bool:
        is_plain = override.type is OverrideType.CHANGE and override.package is None
        is_one = is_plain and not override.is_sweep_override()
        return is_one and not (override.is_hydra_override() or self._is_choice(override))

    def _is_choice(self, override: Override) -> bool:
        """Return True if it chooses an option in the defaults list, which no value can affect."""
        if override.is_hydra_override() or isinstance(override.value(), dict):
            return False
        key, hydra = override.key_or_group, self.config.hydra
        if key not in self._is_group:  # a group may also come from an added search path
            # Not resolved: hydra.sweep.subdir=${hydra.job.override_dirname} would fail here.
            typed = typed_overrides(hydra.overrides.hydra)
            options = self.loader.get_group_options(key, None, hydra.job.config_name, typed)
            self._is_group[key] = bool(options)
        return self._is_group[key]
