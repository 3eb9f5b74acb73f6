"""Coordinates, expert groups and copies of the published layout, counted by hand."""

from headrace.parallel.mesh import Mesh

V3 = {"pipeline": 16, "data": 128, "expert": 64, "node_size": 8}


def test_ranks_of_the_published_layout():
    mesh = Mesh(**V3, rank=3 * 128 + 70)
    assert (mesh.world, mesh.pipeline_rank, mesh.data_rank, mesh.expert_rank) == (2048, 3, 70, 6)
    assert mesh.at(3, 70) == mesh.rank
    assert mesh.expert_group() == tuple(range(3 * 128 + 64, 4 * 128))
    assert mesh.rank in mesh.expert_group()


def test_copies_of_a_stage_in_both_directions_of_dualpipe():
    mesh = Mesh(**V3, rank=3 * 128 + 70)
    everything = mesh.copies((3, 12), experts=False)
    assert everything == (*range(3 * 128, 4 * 128), *range(12 * 128, 13 * 128))
    assert mesh.copies((12, 3), experts=True) == (3 * 128 + 6, 3 * 128 + 70, 12 * 128 + 6, 12 * 128 + 70)


def test_every_expert_is_on_one_rank_of_a_group_and_on_every_group():
    meshes = [Mesh(2, 4, 2, 1, rank) for rank in range(8)]
    for mesh in meshes:
        others = [m for m in meshes if m.rank in mesh.copies((0, 1), experts=True)]
        assert {m.expert_rank for m in others} == {mesh.expert_rank}
        assert len(others) == 4
