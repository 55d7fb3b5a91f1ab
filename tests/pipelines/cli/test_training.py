"""`orpo train`: what is told before anything is read."""


def test_a_sweep_has_no_dry_run(orpo, tmp_path):
    done = orpo("train", "--dataset", tmp_path, "--model", "base", "--dry-run", "--sweep", "lambda=0.1,0.5")
    assert (done.code, done.err) == (
        2,
        "orpo: --dry-run: is for one run, not for a --sweep; give its values with --set\n",
    )
