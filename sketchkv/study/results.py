"""The names that notebooks know `sources`, `store` and `record` by."""

from sketchkv.study.record import (  # noqa: F401
    INTERACTIVE,
    MAKE_DEFAULTS,
    Paths,
    Run,
    load_table,
    provenance_path,
    remove_leftovers,
    start,
)
from sketchkv.study.sources import (  # noqa: F401
    DATASETS,
    DEVICES,
    HUB_MODELS,
    PROFILES,
    ROOT,
    KnobError,
    atomic_write,
    check_knobs,
    commit,
    data_revision,
    model_revision,
    read_json,
    sha256,
    to_json,
    versions,
)
from sketchkv.study.store import read_point, write_point  # noqa: F401
