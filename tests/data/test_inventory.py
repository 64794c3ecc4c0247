"""What is said when a run's data have changed."""

from fastsp.data.inventory import Inventory, Part


def test_tars_of_one_name_are_not_mistaken_for_each_other():
    """img2dataset numbers the shards of every subset from 00000."""
    before = Inventory((Part("00000.tar", 10, "a"), Part("00000.tar", 20, "b")))
    assert before.difference(Inventory(before.parts)) is None
    grown = Inventory((before.parts[0], Part("00000.tar", 25, "c")))
    assert before.difference(grown) == "30 samples before, 35 now, 00000.tar had 20 and has 25"
    assert before.difference(Inventory(before.parts[::-1])) == "30 samples before, 30 now, 00000.tar had 10 and has 20"
    renamed = Inventory((before.parts[0], Part("00001.tar", 20, "b")))
    assert before.difference(renamed) == "30 samples before, 30 now, 00001.tar is new"
    other = Inventory((Part("a.tar", 1, "a"), Part("b.tar", 1, "b")))
    assert other.difference(Inventory(other.parts[::-1])) == "2 samples before, 2 now, in another order"
