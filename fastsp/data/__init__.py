"""Data: from files to the batches of a training step, in the order in which a sample goes through these modules.

- The interface: `source` (`open_source`, `Source`), `batch` (what it gives), `prefetch` (in threads, ahead).
- Which sample: `order` (the permutation of an epoch), `inventory` (whether a run goes on with the same data).
- Reading: `samples` (what all readers share), `folder`, `shards` (over `tar_index`, made by `tar_scan`), `latents`,
  `digits`, `captions`.
- Decoding: `decode` (of a batch, on either device), `jpeg`, `pillow_images` (the other kinds), `orientation`,
  `libraries` (imported where there are pictures alone).
- Pixels: `pipeline` (DALI), `geometry` (where crops and flips are). Together: `collate`.
- Bad ones: `bad_samples` (named, counted, too many).
- Commands: `check` (`fastsp data check`), `encode` (`fastsp encode`). `cache`: where what can be made again is kept.
"""
