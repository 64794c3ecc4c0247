"""The pictures of a run's own data, which an evaluation looks at."""

from data.helpers import encode, photo, write_tar

from fastsp.config import DataConfig
from fastsp.data.inventory import FILE
from fastsp.data.shards import ShardReader
from fastsp.evaluation.reference import training_pictures


def test_a_shard_that_is_gone_since_the_run_began_costs_its_own_pictures_alone(tmp_path):
    for shard in range(3):
        members = [(f"{shard}.jpg", encode(photo(shard, 16, 16))), (f"{shard}.txt", b"picture %d" % shard)]
        write_tar(tmp_path / f"{shard}.tar", members)
    pattern = str(tmp_path / "{0..2}.tar")
    (tmp_path / "run").mkdir()
    ShardReader(pattern).inventory().save(tmp_path / "run" / FILE)
    (tmp_path / "1.tar").unlink()
    pictures = training_pictures(
        DataConfig(source="shards", path=pattern, resolution=16, batch_size=2), 3, tmp_path / "run"
    )
    assert sorted(pictures.captions) == ["picture 0", "picture 2"]
