"""conf/ is loaded, so that it cannot rot: it names every key, with its default."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from taskd.config.loader import load_broker_config, load_worker_config
from taskd.config.schema import BrokerConfig, Section, WorkerConfig
from taskd.config.shape import leaves
from taskd.config.yaml_file import read_yaml

CONF = Path(__file__).parents[2] / "conf"


def keys_of(model: Section, path: tuple[str, ...] = ()):
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, Section):
            yield from keys_of(value, (*path, name))
        elif isinstance(value, dict):
            for key, below in value.items():
                yield from keys_of(below, (*path, name, key))
        else:
            yield (*path, name)


@pytest.mark.parametrize(
    ("name", "load", "defaults", "differs"),
    [
        ("broker.yaml", load_broker_config, BrokerConfig(), {"data_dir": Path("/var/lib/taskd")}),
        ("worker.yaml", load_worker_config, WorkerConfig(), {}),
    ],
)
def test_the_examples_hold_the_defaults_and_name_every_key(name, load, defaults, differs):
    assert load(CONF / name, {}, {}) == defaults.model_copy(update=differs)
    named = set(read_yaml(CONF / name).lines)
    assert [key for key in keys_of(defaults) if key not in named] == []


@pytest.mark.parametrize(("name", "model"), [("broker.yaml", BrokerConfig), ("worker.yaml", WorkerConfig)])
def test_the_examples_show_also_the_keys_of_sections_that_are_off(name, model):
    text = (CONF / name).read_text()
    assert [path for path, _ in leaves(model) if not re.search(rf"\b{path[-1]}:", text)] == []


@pytest.mark.parametrize("unit", ["taskd-broker.service", "taskd-worker@.service"])
def test_units_start_a_command_that_exists(unit):
    # Not strict: in a unit, a list is a key that comes several times.
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.read(CONF / "systemd" / unit)
    assert parsed["Service"]["Type"] == "notify"
    assert parsed["Service"]["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert parsed["Service"]["ExecStart"].split()[1] in ("broker", "worker")
