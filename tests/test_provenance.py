"""What a measurement was made with."""

from minimistral.provenance import commit_of, provenance


def test_a_record_says_what_ran_where():
    told = provenance("python benchmarks/x.py", threads=7, seed=3)
    assert told["command"] == "python benchmarks/x.py" and told["seed"] == 3
    assert told["threads"] == 7, "what is given stands instead of what was found"
    assert all(told[key] for key in ("date", "system", "processor", "cores", "python", "torch"))


def test_a_folder_without_a_checkout_has_no_commit(tmp_path):
    assert commit_of(tmp_path) is None
