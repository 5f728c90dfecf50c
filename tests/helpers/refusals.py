"""What a refused command must look like."""


def assert_refused(result: tuple[int, str, str], says: str, *, code: int = 2) -> None:
    got, out, err = result
    assert got == code
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert err.count("\n") == (1 if code == 2 else 2), "one line, below one for a failed cell"
    assert says in err
