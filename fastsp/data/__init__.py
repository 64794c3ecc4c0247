"""Data: from files to the batches of a training step.

- The interface: `config` (the section of a configuration), `source` (`open_source`, `Source`), `batch` (what it gives).
- Which sample: `order` (the permutation of an epoch), `inventory` (whether a resumed run has the same data).
- From files to bytes: `readers`; `samples` is what they share. From bytes to pixels: `images`. Together: `collate`.
- In threads, ahead: `prefetch`. Bad samples, named and counted: `bad_samples`.
- Commands: `check` (`fastsp data check`), `encode` (`fastsp encode`).
"""
