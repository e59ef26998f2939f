"""No two tests hear each other, in whatever processes they run."""
import subprocess
import sys
from pathlib import Path

from domains import new_domain

OTHER = 'from domains import new_domain; print(*(new_domain() for _ in range(9)), new_domain(keep=True), flush=True); input()'


def test_processes_that_begin_at_one_number_have_different_domains_and_leave_them_when_they_end(monkeypatch):
    monkeypatch.setenv('ROS_DOMAIN_ID', str(new_domain()))
    others = [subprocess.Popen([sys.executable, '-c', OTHER], cwd=Path(__file__).parent, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE) for _ in range(2)]
    taken = [{int(number) for number in other.stdout.readline().split()} for other in others]
    assert len(taken[0]) == len(taken[1]) == 10 and taken[0].isdisjoint(taken[1])
    assert all(1 <= domain <= 101 for domain in taken[0] | taken[1])
    mine = [new_domain() for _ in range(9)]
    assert len({*mine}) == 9 and taken[0].isdisjoint(mine) and taken[1].isdisjoint(mine)
    for other in others:
        other.communicate('')
    assert (taken[0] | taken[1]) & {new_domain() for _ in range(101)}
