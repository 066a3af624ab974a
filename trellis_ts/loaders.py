"""Loaders of windows and segments: in which order they are drawn, and which part of a batch is whose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from trellis_ts.shuffling import RandomOrder
from trellis_ts.types import Batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from trellis_ts.config import TrainingConfig
    from trellis_ts.datasets.streams import Group, SegmentDataset
    from trellis_ts.datasets.windows import WindowDataset
    from trellis_ts.types import Segment

# More windows than this are not shuffled in memory.
_MOST_SHUFFLED = 1 << 20
_DRAWN_AT_ONCE = 4096
NOT_COUNTED = -1
"""In the place of the series of a window that stands in for none."""


class EpochSampler(Sampler[int]):
    """A fresh random order of windows every epoch, fixed by the seed and the epoch alone, so that a resumed run sees
    the order an uninterrupted one would have seen.

    Of very many windows the order is computed as it is read, a few thousand at a time: an epoch of
    ``windows_per_epoch`` then costs the same however many there are, and no list of all is ever held.
    """

    def __init__(self, num_windows: int, *, seed: int, windows_per_epoch: int | None) -> None:
        self.num_windows = num_windows
        self.seed = seed
        self.length = min(num_windows, windows_per_epoch or num_windows)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        if self.num_windows <= _MOST_SHUFFLED:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.num_windows, generator=generator)[: self.length]
            for start in range(0, self.length, _DRAWN_AT_ONCE):  # a list of all would hold five times the memory
                yield from order[start : start + _DRAWN_AT_ONCE].tolist()
            return
        computed = RandomOrder(self.num_windows, (self.seed, self.epoch))
        for start in range(0, self.length, _DRAWN_AT_ONCE):
            yield from computed.at(start, min(start + _DRAWN_AT_ONCE, self.length)).tolist()


def _as_is(batch: Any) -> Any:
    """Batches come whole from the data set, not as lists of windows to be stacked."""
    return batch


class RankBatches(Sampler["list[int]"]):
    """One process's part of every batch: all of them together read what a single process would.

    Args:
        sampler: the order of all windows.
        batch_size: of all processes together.
        rank: which of the processes this is, from 0 on.
        num_ranks: how many there are.
    """

    def __init__(self, sampler: Iterable[int], batch_size: int, *, rank: int = 0, num_ranks: int = 1) -> None:
        self.sampler = sampler  # Lightning looks for it here, and tells it the epoch
        self.batches = BatchSampler(sampler, batch_size, drop_last=False)
        self.rank, self.num_ranks = rank, num_ranks

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.rank :: self.num_ranks]


class SharedWindows(Dataset[Batch]):
    """Windows for a process that may get none of a batch: one that counts for nothing stands in, so that all processes
    take the same steps."""

    def __init__(self, windows: WindowDataset) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        if indices:
            return self.windows.__getitems__(indices)
        batch = self.windows.__getitems__([0])
        if batch.future_observed is None:
            raise AssertionError("windows have a future")
        return batch._replace(
            series=torch.full_like(batch.series, NOT_COUNTED), future_observed=torch.zeros_like(batch.future_observed)
        )


class WindowDataModule(lightning.LightningDataModule):
    """Loaders over two window datasets, which gather whole batches themselves."""

    def __init__(self, train: WindowDataset, validation: WindowDataset, config: TrainingConfig) -> None:
        super().__init__()
        self.train, self.validation, self.config = train, validation, config

    def train_dataloader(self) -> DataLoader[Batch]:
        sampler = EpochSampler(len(self.train), seed=self.config.seed, windows_per_epoch=self.config.windows_per_epoch)
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.validation, range(len(self.validation)))

    def _loader(self, windows: WindowDataset, sampler: Iterable[int]) -> DataLoader[Batch]:
        trainer = self.trainer
        rank, num_ranks = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        return DataLoader(
            SharedWindows(windows),
            batch_sampler=RankBatches(sampler, self.config.batch_size, rank=rank, num_ranks=num_ranks),
            collate_fn=_as_is,
            **_worker_options(self.config),
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_index: int) -> Batch:
        return batch.to(device)


def _worker_options(config: TrainingConfig) -> dict[str, Any]:
    return {
        "num_workers": config.num_workers,
        "persistent_workers": config.num_workers > 0,
        # A loader draws a seed for its workers whenever it begins, which is not to shift the numbers of dropout.
        "generator": torch.Generator().manual_seed(config.seed),
    }


class SegmentSampler(Sampler["tuple[Group, int]"]):
    """Segments in order, groups of streams drawn anew every epoch, fixed by the seed and the epoch alone."""

    def __init__(self, segments: SegmentDataset, *, seed: int) -> None:
        self.segments, self.seed, self.epoch = segments, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of an epoch."""
        self.epoch = epoch

    def _groups(self) -> list[Group]:
        return self.segments.random_groups(self.seed * 1_000_003 + self.epoch)

    def __len__(self) -> int:
        return sum(group.num_segments for group in self._groups())

    def __iter__(self) -> Iterator[tuple[Group, int]]:
        for group in self._groups():
            yield from ((group, number) for number in range(group.num_segments))


class SegmentDataModule(lightning.LightningDataModule):
    """Loaders over segments: at random for training, all in order for validation."""

    def __init__(self, train: SegmentDataset, validation: SegmentDataset, config: TrainingConfig) -> None:
        super().__init__()
        self.train, self.validation, self.config = train, validation, config

    def train_dataloader(self) -> DataLoader[Segment]:
        return self._loader(self.train, SegmentSampler(self.train, seed=self.config.seed))

    def val_dataloader(self) -> DataLoader[Segment]:
        groups = self.validation.all_groups(self.config.validation_windows)
        return self._loader(
            self.validation, [(group, number) for group in groups for number in range(group.num_segments)]
        )

    def _loader(self, segments: SegmentDataset, order: Any) -> DataLoader[Segment]:
        return DataLoader(segments, batch_size=None, sampler=order, **_worker_options(self.config))

    def transfer_batch_to_device(self, batch: Segment, device: torch.device, dataloader_index: int) -> Segment:
        return batch.to(device)
