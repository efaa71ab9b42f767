"""The settings that every data set has, whatever it holds."""

from __future__ import annotations

from zoo.config import config
from zoo.datamodules.manifest import FileConfig


@config
class DataConfig:
    """What a data set is, where its files lie, and how batches are made of it.

    Attributes:
        id, title, source, licence: what the data set is, for cards and listings.
        root: folder that the files' paths are relative to; None: the catalogue's, then the working directory.
        batch_size, eval_batch_size: samples a batch, in training and otherwise (None: the same).
        bucket: group samples of similar length, looking this many batches ahead; 0: no. Samples of one length have no
            use for it.
        num_workers: processes that build batches; 0: the training process itself.
    """

    id: str = ""
    title: str = ""
    source: str = ""
    licence: str = ""
    root: str | None = None
    batch_size: int = 32
    eval_batch_size: int | None = None
    bucket: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.eval_batch_size is not None and self.eval_batch_size < 1):
            raise ValueError("batch_size and eval_batch_size must be at least 1")
        if self.bucket < 0 or self.num_workers < 0:
            raise ValueError("bucket and num_workers must not be negative")


@config
class SplitFilesConfig(DataConfig):
    """A data set whose splits are lists of files.

    Attributes:
        train, val, test: the files of each split.
    """

    train: tuple[FileConfig, ...] = ()
    val: tuple[FileConfig, ...] = ()
    test: tuple[FileConfig, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.train or self.val or self.test):
            raise ValueError("at least one of train, val and test must name files")
