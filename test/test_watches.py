"""Standing questions without ROS: conditions, alerts, who is checked when, what a restart brings back."""
import json
import re
import time
from pathlib import Path

import pytest

from conftest import SECOND
from statekv_ros.conditions import KINDS, parse_condition
from statekv_ros.conditions.pattern import TEXT_CHARS, Pattern
from statekv_ros.errors import Code, QuestionError, StateKVError
from statekv_ros.memory import AnswerResult
from statekv_ros.node.watches.kept import FILE, KeptWatches
from statekv_ros.node.watches.table import WatchTable
from statekv_ros.node.watches.watch import Definition, Watch, define

FIELDS = {'question': 'what is in view?', 'camera': 'front', 'condition': 'changes', 'every_steps': 1, 'every_s': 0.0,
          'debounce': 1, 'expires_s': 0.0, 'max_tokens': 8, 'answer_policy': 'last(4)'}


def definition(**fields) -> Definition:
    return Definition(**FIELDS | fields)


def answer(text: str, stamp_ns: int = SECOND) -> AnswerResult:
    return AnswerResult('what is in view?', text, (1,), 'stop', 0, stamp_ns, 1, (), 4, 1, 9, 1.0, 1.0, 1.0, 'statekv(64)',
                        'last(4)', False)


def alerts_of(watch: Watch, texts: list[str]) -> list[tuple[int, str, str]]:
    """For each alert: number of the check that it came with, the answer before and now."""
    told = []
    for number, text in enumerate(texts):
        alert, _ = watch.take(answer(text, number), watch.holds(text))
        if alert is not None:
            told.append((number, alert.before, alert.result.text))
    return told


# --- patterns ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('pattern, text, found', [
    ('red|blue', 'a Blue ball', True), ('^yes', 'oh yes', False), (r'\bball\b', 'balls', False), (r'[^a-c]+$', 'abc', False),
    (r'(red|blue) (ball|box){1,2}', 'the red box', True), (r'\d{2,}', '7 and 12', True), (r'\.', 'end.', True), ('', 'x', True)])
def test_patterns_of_everyday(pattern, text, found):
    assert Pattern(pattern).search(text) is found is bool(re.search(pattern, text, re.IGNORECASE))


@pytest.mark.parametrize('pattern', ['(a+)+$', '(a|a)*$', '(a|aa)+$', '(.*)*x', '(?:a?){200}a{5}', 'a*' * 90 + 'b'])
def test_no_pattern_holds_the_node_up(pattern):
    watch, begun = Pattern(pattern), time.thread_time()
    try:
        assert watch.search('a' * 10**6 + '!') in (True, False)
    except QuestionError as error:
        assert 'more than 50 ms' in str(error) and error.code == Code.INVALID_CONDITION
    assert time.thread_time() - begun < 5, 'others take years'


def test_what_stands_behind_the_first_characters_is_not_looked_at():
    assert Pattern('b').search('a' * (TEXT_CHARS - 1) + 'b') and not Pattern('b').search('a' * TEXT_CHARS + 'b')


@pytest.mark.parametrize('pattern, words', [
    ('[', 'unterminated'), ('a)', 'parenthesis'), ('(a', 'missing )'), ('*', 'nothing to repeat'), ('a{3,1}', 'min repeat'),
    ('a**', 'multiple repeat'), ('[z-a]', 'bad character range'), ('x' * 201, '201 characters'),
    ('(((a{50}){50}){50})', '125000 together'), ('a{1000000000}', '1000000000 together'), ('a{2,2000}', '2000 together')])
def test_what_is_no_pattern_is_refused_with_the_reason(pattern, words):
    with pytest.raises(QuestionError) as error:
        parse_condition(f'matches {pattern}')
    assert words in str(error.value) and error.value.code == Code.INVALID_CONDITION


# --- conditions -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('condition, before, now, holds', [
    ('changes', '', 'red', False), ('changes', 'red', 'Red. ', False), ('changes', 'red', 'blue', True),
    ('equals yes', '', ' Yes.', True), ('equals yes', '', 'yes it is', False),
    ('Equals  the red ball.', '', 'the  Red ball', True),
    ('matches red|blue', '', 'a BLUE box', True), ('matches ^no', '', 'none', True), ('matches ^no$', '', 'none', False),
    ('rises above 3', '', 'there are 4', True), ('rises above 3', '', '3', False), ('rises above 3', '', 'four', False),
    ('rises above -1.5', '', '-1.25', True), ('falls below 1e2', '', '99.9 %', True), ('falls below 1', '', 'none', False),
    ('rises above 3', '', '9' * 400, True)])
def test_condition_holds(condition, before, now, holds):
    assert parse_condition(condition).holds(before, now) is holds


def test_every_kind_is_tried_above_and_named_in_the_refusal():
    with pytest.raises(QuestionError) as error:
        parse_condition('door open')
    assert all(kind in str(error.value) for kind in KINDS) and 'door open' in str(error.value)


@pytest.mark.parametrize('condition', [
    '', 'changes now', 'equals', 'equals  ', 'matches', 'rises above', 'rises above NaN', 'falls below inf', 'rises above three',
    'rises 3', 'x' * 301])
def test_condition_that_cannot_be_read_is_refused(condition):
    with pytest.raises(QuestionError, match='condition') as error:
        parse_condition(condition)
    assert error.value.code == Code.INVALID_CONDITION


@pytest.mark.parametrize('field, value', [
    ('question', ' '), ('every_steps', -1), ('every_s', -1.0), ('every_s', float('nan')), ('every_s', float('inf')),
    ('expires_s', -0.1), ('debounce', -1), ('debounce', 10**6), ('max_tokens', 10**6), ('answer_policy', 'last(0)'),
    ('camera', 'rear'), ('condition', 'is open')])
def test_field_that_cannot_work_is_named(field, value):
    with pytest.raises(StateKVError, match='last' if field == 'answer_policy' else field):
        define(['front'], 'last(4)', 64, **FIELDS | {'every_steps': 0, field: value})


def test_zeros_and_empty_fields_stand_for_defaults():
    made = define(['front'], 'last(2)', 5000, **FIELDS | {'camera': '', 'every_steps': 0, 'debounce': 0, 'max_tokens': 0,
                                                         'answer_policy': ''})
    assert (made.camera, made.every_steps, made.debounce, made.max_tokens, made.answer_policy) == ('front', 1, 1, 1024, 'last(2)')
    assert define(['front'], 'all', 8, **FIELDS | {'every_steps': 0, 'every_s': 2.0}).every_steps == 0
    with pytest.raises(QuestionError, match='one camera, front or rear'):
        define(['front', 'rear'], 'all', 8, **FIELDS | {'camera': ''})


# --- alerts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('condition, debounce, texts, expected', [
    ('changes', 1, ['a', 'a', 'b', 'B.', 'a'], [(2, 'a', 'b'), (4, 'b', 'a')]),
    ('changes', 2, ['a', 'b', 'a', 'b', 'b', 'b'], [(4, 'a', 'b')]),
    ('changes', 2, ['a', 'b', 'c', 'c'], [(3, 'a', 'c')]),
    ('changes', 1, ['', 'a', 'b'], [(2, 'a', 'b')]),
    ('equals yes', 1, ['no', 'yes', 'yes', 'no', 'yes'], [(1, 'no', 'yes'), (4, 'no', 'yes')]),
    ('equals yes', 2, ['yes', 'no', 'yes', 'yes', 'no', 'yes', 'no', 'no', 'yes', 'yes'], [(3, 'no', 'yes'), (9, 'no', 'yes')]),
    ('equals yes', 1, ['yes'], [(0, '', 'yes')]),
    ('rises above 2', 1, ['1', '2', '3', '4', '2', '5'], [(2, '2', '3'), (5, '2', '5')]),
])
def test_alert_comes_once_when_it_has_held_for_so_many_checks_and_again_when_it_ceased_to(condition, debounce, texts, expected):
    watch = Watch('1', definition(condition=condition, debounce=debounce))
    assert alerts_of(watch, texts) == expected
    assert (watch.alerts, watch.checks, watch.text) == (len(expected), len(texts), texts[-1])


def test_alert_says_since_when_it_held():
    watch = Watch('1', definition(debounce=3))
    alerts = [alert for stamp, text in enumerate('aabbb', 1) if (alert := watch.take(answer(text, stamp), watch.holds(text))[0])]
    assert [(alert.since_ns, alert.result.last_stamp_ns) for alert in alerts] == [(3, 5)]


def test_after_a_reset_the_first_answer_is_no_change_and_what_held_is_told_anew():
    change, level = Watch('1', definition()), Watch('2', definition(condition='equals a'))
    for watch, again in ((change, []), (level, [(0, '', 'a')])):
        alerts_of(watch, ['b', 'a'])
        watch.forget_answers()
        assert alerts_of(watch, ['a']) == again


# --- when -------------------------------------------------------------------------------------------------------------

def run(table: WatchTable, steps: int, checks_a_step: int, seconds: float = 1.0) -> list[list[str]]:
    """Ids that are checked at each step."""
    checked = []
    for step in range(steps):
        table.note_step('front', int((step + 1) * seconds * SECOND))
        checked.append([])
        for _ in range(checks_a_step):
            taken = table.take_due()
            table.take(taken, answer('red'))
            checked[-1] += [watch.id for watch in taken]
    return checked


def test_watch_is_due_at_once_and_then_each_so_many_steps_or_seconds():
    table = WatchTable(['front'], 10)
    table.add(definition(every_steps=3))
    table.add(definition(question='by time?', every_steps=0, every_s=1.0))
    told = run(table, 7, 2, seconds=0.5)
    assert [sorted(ids) for ids in told] == [['1', '2'], [], ['2'], ['1'], ['2'], [], ['1', '2']]
    table.note_step('front', SECOND // 100)     # stamps go back
    assert [watch.id for watch in table.take_due()] == ['2']
    table.note_step('rear', 10 * SECOND)
    assert table.take_due() == []


def test_those_that_ask_the_same_share_a_check():
    table = WatchTable(['front'], 10)
    for condition in ('changes', 'equals red', 'matches r'):
        table.add(definition(condition=condition))
    table.add(definition(answer_policy='all'))
    assert run(table, 1, 2) == [['1', '2', '3', '4']]


def test_too_many_for_the_time_are_skipped_evenly_and_counted():
    table = WatchTable(['front'], 10)
    for number in range(5):
        table.add(definition(question=f'{number}?'))
    run(table, 50, 2)
    watches = table.all()
    assert {watch.checks for watch in watches} == {20} and all(watch.behind for watch in watches)
    assert all(watch.checks + watch.skipped + (watch.due is not None) == 50 for watch in watches)
    run(table, 10, 5)
    assert not any(watch.behind for watch in watches)


def test_a_slow_one_is_not_starved_by_fast_ones():
    table = WatchTable(['front'], 10)
    for number in range(3):
        table.add(definition(question=f'{number}?'))
    slow = table.add(definition(question='slow?', every_steps=10))
    run(table, 100, 1)
    assert slow.checks >= 9 and slow.skipped == 0


def test_the_same_again_is_the_same_watch_and_too_many_are_refused():
    table = WatchTable(['front'], 2)
    first = table.add(definition(expires_s=50.0))
    first.ends_at = 0.0
    assert table.add(definition(expires_s=50.0)) is first and first.ends_at > time.time() + 40
    table.add(definition(question='other?'))
    with pytest.raises(QuestionError, match='2 watches are there already, 2 are allowed.*max_watches') as error:
        table.add(definition(question='third?'))
    assert error.value.code == Code.TOO_MANY_WATCHES
    with pytest.raises(QuestionError, match="unknown watch '9': the ids are 1, 2") as error:
        table.remove('9')
    assert error.value.code == Code.UNKNOWN_WATCH
    assert (table.remove('1'), len(table), table.add(definition(question='third?')).id, table.remove('all')) == (1, 1, '3', 2)


def test_it_ends_when_its_time_is_over():
    table = WatchTable(['front'], 2)
    ending, staying = table.add(definition(expires_s=0.001)), table.add(definition())
    time.sleep(0.01)
    assert table.expire() == [ending] and table.all() == [staying] and table.expire() == []


# --- over a restart ---------------------------------------------------------------------------------------------------

def kept_in(folder: Path, model: str = 'one') -> tuple[KeptWatches, list[str]]:
    """What writes at once, and what it says."""
    said = []
    return KeptWatches(folder, model, lambda work: work() or True, said.append), said


def restored(folder: Path, model: str = 'one', configured=(), cameras=('front',)) -> tuple[WatchTable, list[str]]:
    kept, said = kept_in(folder, model)
    table = WatchTable(cameras, 10)
    kept.restore(table, list(configured))
    return table, said


def test_watches_come_back_with_their_answers_and_go_on_from_there(tmp_path):
    table = WatchTable(['front'], 10)
    watch = table.add(definition(expires_s=100.0))
    table.add(definition(question='half a pair \udcff?', condition='equals a'))
    table.remove('2')
    table.put([Watch('door', definition(question='door?'), configured=True)])
    alerts_of(watch, ['a', 'b'])
    kept_in(tmp_path)[0].save(table)
    again, said = restored(tmp_path, configured=[Watch('door', definition(question='door?'), configured=True)])
    first, door = sorted(again.all(), key=lambda watch: watch.configured)
    assert said == [] and (first.definition, first.ends_at, first.text) == (watch.definition, watch.ends_at, 'b')
    assert (first.checks, first.alerts, first.stamp_ns) == (2, 1, 1) and door.id == 'door' and door.configured
    assert alerts_of(first, ['c']) == [(0, 'b', 'c')], 'what changed while the node was down is told'
    assert again.add(definition(question='new?')).id == '3', 'no id is given twice'


def test_another_model_keeps_the_watches_without_their_answers_and_says_so(tmp_path):
    table = WatchTable(['front'], 10)
    alerts_of(table.add(definition()), ['a'])
    kept_in(tmp_path)[0].save(table)
    again, said = restored(tmp_path, 'two')
    assert len(said) == 1 and '1 watches' in said[0] and 'another model' in said[0]
    assert [watch.text for watch in again.all()] == [''] and alerts_of(again.all()[0], ['b']) == []


def test_what_is_configured_no_more_ends_what_is_configured_anew_begins_anew_and_cameras_may_be_gone(tmp_path):
    table = WatchTable(['front', 'rear'], 10)
    table.put([Watch('door', definition(), configured=True), Watch('gone', definition(), configured=True)])
    rear = table.add(definition(camera='rear', question='rear?'))
    alerts_of(table.all()[0], ['a'])
    kept_in(tmp_path)[0].save(table)
    again, said = restored(tmp_path, configured=[Watch('door', definition(debounce=2), configured=True)])
    by_id = {watch.id: watch for watch in again.all()}
    assert by_id.keys() == {'door', rear.id} and by_id['door'].text == '' and "'gone'" in ''.join(said)
    assert "no camera 'rear'" in by_id[rear.id].error
    again.note_step('front', SECOND)
    assert [watch.id for watch in again.take_due()] == ['door']


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'\xff\xfe', b'{"format": 2}', b'null', b'[' * 100_000,
                                     b'{"format": 1, "model": "one", "number": "x", "watches": []}'])
def test_a_file_that_cannot_be_read_is_told_and_put_aside(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    table, said = restored(tmp_path)
    assert len(table) == 0 and len(said) == 1 and 'cannot be read' in said[0]
    assert (tmp_path / f'{FILE}.unreadable').read_bytes() == content
    kept_in(tmp_path)[0].save(table)
    assert restored(tmp_path)[1] == []


def test_a_watch_that_cannot_be_read_costs_itself_alone(tmp_path):
    table = WatchTable(['front'], 10)
    for number in range(6):
        table.add(definition(question=f'{number}?'))
    kept_in(tmp_path)[0].save(table)
    content = json.loads((tmp_path / FILE).read_text())
    for number, (field, value) in enumerate([('checks', 'many'), ('ends_at', 'late'), ('definition', {}), ('id', 7)]):
        content['watches'][number][field] = value
    content['watches'][4]['definition']['condition'] = 'is open'
    (tmp_path / FILE).write_text(json.dumps(content))
    again, said = restored(tmp_path)
    assert [watch.definition.question for watch in again.all()] == ['5?'] and len(said) == 5


def test_of_two_who_save_at_once_the_later_write_has_what_both_changed(tmp_path):
    table, waiting = WatchTable(['front'], 10), []
    kept = KeptWatches(tmp_path, 'one', lambda work: waiting.append(work) or True, print)
    for question in ('first?', 'second?'):
        table.add(definition(question=question))
        kept.save(table)
    for work in reversed(waiting):      # the threads that handed them over overtook each other
        work()
    assert len(restored(tmp_path)[0]) == 2


def test_a_write_that_fails_is_told_once_and_leaves_the_old_file(tmp_path):
    table = WatchTable(['front'], 10)
    table.add(definition())
    kept, said = kept_in(tmp_path)
    kept.save(table)
    table.add(definition(question='other?'))
    (tmp_path / f'{FILE}.new').mkdir()      # nothing can be written there
    done = []
    kept.save(table, lambda: done.append(1))
    kept.save(table, lambda: done.append(2))
    assert len(said) == 1 and 'not kept for a restart' in kept.problem and done == [1, 2]
    assert len(restored(tmp_path)[0]) == 1
    (tmp_path / f'{FILE}.new').rmdir()
    kept.save(table)
    assert kept.problem == '' and len(restored(tmp_path)[0]) == 2


def test_a_pattern_that_takes_too_long_fails_its_own_watch_alone():
    table = WatchTable(['front'], 10)
    slow = table.add(definition(condition='matches (a|aa)+$'))
    ball = table.add(definition(condition='matches a'))
    table.note_step('front', SECOND)
    watches = table.take_due()
    assert watches == [slow, ball], 'one answer for both'
    [alert] = table.take(watches, answer('a' * 200 + '!'))
    assert alert.id == ball.id and not ball.error
    assert (slow.failed, slow.checks) == (1, 0) and 'more than 50 ms' in slow.error
