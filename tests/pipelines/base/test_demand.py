from pipelines.base.demand import Cluster, Demand, in_words

LEARNER = (("CPU", 1.0), ("GPU", 1.0))
READER = (("CPU", 1.0),)


def test_a_group_fits_where_each_of_its_parts_finds_room_beside_the_others():
    four = Demand((LEARNER,) * 4, 1)
    assert four.fits([{"CPU": 2, "GPU": 2}, {"CPU": 2, "GPU": 2}])
    assert not four.fits([{"CPU": 3, "GPU": 4}, {"CPU": 8}])  # GPUs enough, CPUs beside them not
    assert not four.fits([{"CPU": 8, "GPU": 3}])
    assert Demand((READER, LEARNER), 1).fits([{"CPU": 1, "GPU": 1}, {"CPU": 1}])  # the larger one first
    assert Demand(((("GPU", 0.5),),), 1).fits([{"GPU": 0.5}])


def test_what_waits_and_what_is_there_are_said_in_words():
    assert str(Demand((LEARNER,) * 4, 1)) == "4 x (1 CPU, 1 GPU) all at once"
    assert str(Demand((READER,), 3)) == "3 x (1 CPU)"
    assert in_words({"TPU": 4, "GPU": 0.5, "CPU": 2}) == "2 CPUs, 0.5 GPUs, 4 TPU"
    waiting = [Demand((LEARNER,), 1), Demand((READER,), 1)]
    cluster = Cluster(total=[{"CPU": 2}, {"CPU": 1}], free=[{"CPU": 0}, {"CPU": 0}], waiting=waiting, coming=None)
    assert cluster.describe() == "2 node(s) with 3 CPUs, 0 GPUs in all, of which 0 CPUs, 0 GPUs are free"
    assert cluster.never() == waiting[:1]


def test_what_a_node_has_beside_cpus_and_gpus_counts_and_is_not_shown():
    node = {"CPU": 2.0, "memory": 8e9, "node:10.0.0.1": 1.0, "accelerator_type:H100": 1.0}
    fits, too_large = (Demand(((("CPU", 1.0), ("memory", size)),), 1) for size in (1e9, 9e9))
    here = Demand(((("CPU", 1.0), ("accelerator_type:H100", 0.001), ("node:10.0.0.1", 0.001)),), 1)
    elsewhere = Demand(((("accelerator_type:A100", 0.001),),), 1)
    waiting = [fits, too_large, here, elsewhere]
    cluster = Cluster(total=[node], free=[node | {"CPU": 0.0}], waiting=waiting, coming=None)
    assert cluster.never() == [too_large, elsewhere]
    assert cluster.describe() == "1 node(s) with 2 CPUs, 0 GPUs in all, of which 0 CPUs, 0 GPUs are free"
