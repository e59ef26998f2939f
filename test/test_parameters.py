"""The parameter table against what users read (yaml; the site: test_docs.py), and values that cannot work, at start and at run time."""
import math
import re
from pathlib import Path

import pytest
import yaml

from statekv_ros.errors import FrameError, ParameterError

rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed')

from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from rclpy.parameter import Parameter
from rclpy.serialization import serialize_message  # noqa: E402

from domains import new_domain  # noqa: E402
from live import image, jpeg  # noqa: E402
from statekv_ros.node.memory_node import MemoryNode  # noqa: E402
from statekv_ros.node.parameters import NODE, camera_specs, watch_specs  # noqa: E402
from statekv_ros.node.watches.configured import configured  # noqa: E402
from statekv_ros.transport import ProfileSource, TransportProfile  # noqa: E402

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / 'config' / 'statekv.yaml'
SPECS = {spec.name: spec for spec in (*NODE, *camera_specs('camera', 2.0, 'best_effort'))}


@pytest.fixture(scope='module')
def context():
    """rclpy in this process, in a domain that hears nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'OFF')
        context = rclpy.Context()
        rclpy.init(args=[], context=context, domain_id=new_domain())
        yield context
        rclpy.shutdown(context=context)


@pytest.fixture(scope='module')
def profile():
    """What a node says of its transport."""
    return TransportProfile(ProfileSource.OTHER, None, 'no images are sent here')


@pytest.fixture
def start(context, profile):
    """Makes real nodes in this process with what stands after --ros-args; they are not spun, so they do not start up."""
    made = []

    def start(*arguments: str) -> MemoryNode:
        made.append(MemoryNode(profile, context=context, cli_args=['--ros-args', *arguments]))
        return made[-1]

    yield start
    for node in made:
        node.stop()
        node.destroy_node()


@pytest.fixture(scope='module')
def node(context, profile):
    """A node with the defaults, shared by tests that leave it as it is."""
    node = MemoryNode(profile, context=context)
    yield node
    node.stop()
    node.destroy_node()


def given(**parameters: str) -> list[str]:
    """Command line arguments."""
    return [part for name, value in parameters.items() for part in ('-p', f'{name}:={value}')]


# --- what is written about them ---------------------------------------------------------------------------------------

def test_every_parameter_is_described_and_every_number_has_a_range_around_its_default(node):
    for name, spec in SPECS.items():
        told = node.describe_parameter(name)
        assert told.description == spec.description != '', name
        assert told.read_only is spec.fixed, name
        assert not (spec.fixed and spec.runtime), name
        assert told.additional_constraints or not (spec.choices or spec.check) or name.startswith('pose.'), name
        if isinstance(spec.default, (int, float)) and not isinstance(spec.default, bool):
            [span] = [*told.integer_range, *told.floating_point_range]
            assert span.from_value <= spec.default <= span.to_value, name
        assert spec.verified(spec.default) == spec.default == node.get_parameter(name).value, name


def test_node_has_no_parameter_beside_the_table_and_those_of_ros(node):
    own = {name for name in node._parameters if not name.startswith(('use_sim_time', 'start_type_description_service'))}
    assert own == set(SPECS)


def flat(tree: dict, prefix: str = '') -> dict:
    """Nested mappings as `camera.topic` and so on."""
    return {key: leaf for name, value in tree.items() for key, leaf in
            (flat(value, f'{prefix}{name}.').items() if isinstance(value, dict) else [(prefix + name, value)])}


def test_config_file_names_every_parameter_with_its_default_and_no_other():
    values = flat(yaml.safe_load(YAML.read_text())['/**']['ros__parameters'])
    follow_the_node = {'camera.rate_hz', 'camera.reliability'}     # commented out in the file: they follow the node's
    assert set(values) == set(SPECS) - follow_the_node
    for name in values:
        assert values[name] == SPECS[name].default and type(values[name]) is type(SPECS[name].default), name
    for name in follow_the_node:
        assert f'# {name.removeprefix("camera.")}: ' in YAML.read_text(), name


def test_config_file_starts_a_node_that_has_only_its_model_to_ask_for(start):
    node = start('--params-file', str(YAML))
    assert node._settings.problems == []
    for name, spec in SPECS.items():
        assert node.get_parameter(name).value == spec.default, name


def test_config_file_marks_what_may_change_and_when_as_the_table_does():
    comment, marked = '', {}
    for line in YAML.read_text().split('ros__parameters:')[1].splitlines():
        text = line.strip()
        if match := re.match(r'#? ?([a-z_.]+): ', text):
            marked.setdefault(match[1], ('[runtime]' in comment, '[start]' in comment))
            comment = ''
        elif text.startswith('#'):
            comment += text
        else:
            comment = ''
    own = {spec.name for spec in NODE}
    for name in own:
        assert marked[name] == (SPECS[name].runtime, SPECS[name].fixed), name


# --- values at start --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,value,words', [
    ('budget', '0', 'budget must be at least 1, got 0'),
    ('budget', '-5', 'budget must be at least 1, got -5'),
    ('positions', 'magic', 'positions must be one of "", native, contiguous, lazy_shift, got'),
    ('budget', 'abc', "budget must be of type int, got 'abc'"),
    ('budget', '1.5', 'budget must be of type int, got 1.5'),
    ('budget', 'true', 'budget must be of type int, got True'),
    ('rate_hz', '0.0', 'rate_hz must be at least 0.001 and at most 1000, got 0.0'),
    ('rate_hz', '-2.0', 'got -2.0'),
    ('rate_hz', '.nan', 'rate_hz must be a finite number, got nan'),
    ('rate_hz', '.inf', 'rate_hz must be a finite number, got inf'),
    ('rate_hz', 'fast', "rate_hz must be of type float, got 'fast'"),
    ('camera.rate_hz', '0', 'camera.rate_hz must be at least 0.001'),
    ('restore', 'maybe', 'restore must be one of auto, require, never'),
    ('disk_cache_gb', '.nan', 'disk_cache_gb must be a finite number'),
    ('camera.topic', 'bad topic!', "'bad topic!' is not a topic name"),
    ('camera.topic', 'a//b', "'a//b' is not a topic name"),
    ('camera.topic', "''", "'' is not a topic name"),
    ('camera.reliability', 'perhaps', "camera.reliability must be one of best_effort, reliable, got 'perhaps'"),
    ('prefill_policy', 'rekv', "prefill_policy must be one of statekv, window, full, none, got 'rekv'"),
    ('prefill_policy', 'magic', "prefill_policy must be one of statekv, window, full, none, got 'magic'"),
    ('answer_policy', 'last(0)', 'last'),
    ('answer_policy', 'magic', 'magic'),
    ('stale_after_s', '.nan', 'stale_after_s must be a finite number, got nan'),
    ('cameras', '[]', 'cameras must name at least one camera, got an empty list'),
    ('cameras', "['']", "camera name ''"),
    ('cameras', '[9x]', "camera name '9x'"),
    ('cameras', "['a b']", "camera name 'a b'"),
    ('cameras', '[all]', "camera name 'all'"),
    ('cameras', '[pose]', "camera name 'pose'"),
    ('pose.topic', 'bad topic!', "'bad topic!' is not a topic name"),
    ('pose.type', 'tf', "pose.type must be one of auto, odometry, pose, pose_with_covariance, got 'tf'"),
    ('pose.tolerance_s', '.nan', 'pose.tolerance_s must be a finite number, got nan'),
    ('pose.tolerance_s', '-1.0', 'pose.tolerance_s must be at least 0'),
    ('cameras', '[watch]', "camera name 'watch'"),
    ('watches', '[all]', "watch name 'all' cannot be used"),
    ('watches', '[a, a]', 'watch names must differ'),
    ('watches', "['a b']", "watch name 'a b'"),
    ('watches', '[door]', "watches names 'door', which cannot be: question is empty: ask something (parameters"),
    ('watch_share', '0.0', 'watch_share must be at least 0.01 and at most 1, got 0.0'),
    ('max_watches', '0', 'max_watches must be at least 1'),
    ('watch_answer_policy', 'magic', 'magic'),
    ('cameras', '[front, front]', 'camera names must differ'),
    ('cameras', '[1, 2]', 'cameras must be a list of strings'),
    ('cameras', 'front', "cameras must be a list of strings, got 'front'"),
    ('min_frame_pixels', '300000', 'min_frame_pixels and max_frame_pixels must be positive and in order, got 300000 and 200704'),
])
def test_value_that_cannot_work_is_refused_at_configure_with_its_reason(start, tiny_model_dir, name, value, words):
    node = start(*given(**{'model': tiny_model_dir, name: value}))
    assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
    assert words in node._reason and name.removeprefix('camera.') in node._reason
    assert node._engine is None and node._state_machine.current_state[1] == 'unconfigured'


def test_config_file_shows_a_block_of_a_standing_question_that_works(start, tmp_path):
    text = YAML.read_text()
    block = yaml.safe_load('\n'.join(line.replace('# ', '', 1) for line in text[text.index('    # watch:\n'):].splitlines()))
    assert flat(block).keys() == {spec.name for spec in watch_specs('door')}
    for spec in watch_specs('door'):
        told = f'# {spec.description}'
        assert told in text, told
    file = tmp_path / 'watches.yaml'
    file.write_text(yaml.safe_dump({'/**': {'ros__parameters': {'watches': ['door'], **block}}}))
    node = start('--params-file', str(file))
    assert node._settings.problems == node._settings.unknown == []
    watch, = configured(node._settings.__getitem__)[0]
    assert (watch.id, watch.definition.question, watch.definition.camera) == ('door', 'is the door open?', 'camera')
    assert (watch.definition.condition, watch.definition.every_steps, watch.definition.max_tokens) == ('equals yes', 1, 64)


@pytest.mark.parametrize('field, value, words', [
    ('condition', 'is open', 'condition must be "changes"'), ('condition', 'rises above .nan', 'needs a finite number'),
    ('condition', 'matches (a', 'missing )'), ('every_s', '-1.0', 'must be at least 0'), ('every_steps', '-1', 'at least 0'),
    ('debounce', '0', 'at least 1'), ('camera', 'rear', "unknown camera 'rear'"), ('answer_policy', 'last(0)', 'last'),
    ('max_tokens', '5000', 'at most 1024'), ('question', '7', 'must be of type str')])
def test_standing_question_that_cannot_be_is_told_with_its_parameter(start, field, value, words):
    fields = {'watch.door.question': 'is the door open?', f'watch.door.{field}': value}
    node = start(*given(watches='[door]', **fields))
    assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
    assert words in node._reason and f'"watch.door.{field}"' in node._reason.replace('watch.door.*', f'watch.door.{field}')


def test_more_standing_questions_than_there_may_be_and_blocks_that_are_not_in_use(start):
    node = start(*given(watches='[a, b]', max_watches='1', **{'watch.a.question': 'x?', 'watch.b.question': 'y?',
                                                              'watch.c.question': 'z?', 'watch.a.questoin': 'x?'}))
    assert any('watches names 2, 1 are allowed' in problem and '"max_watches"' in problem for problem in node._settings.problems)
    [unknown] = node._settings.unknown
    assert '"watch.a.questoin"' in unknown and '"watch.a.question"' in unknown


def test_every_bad_value_is_told_at_once(start):
    node = start(*given(budget='0', rate_hz='.nan', prefill_policy='magic', answer_policy='last(0)', cameras='[all]'))
    assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
    for name in ('budget', 'rate_hz', 'prefill_policy', 'last', "'all'"):
        assert name in node._reason


def test_whole_number_is_a_rate_too_and_cameras_follow_the_nodes_rate_unless_they_have_their_own(start):
    node = start(*given(cameras='[front, rear]', rate_hz='5', reliability='reliable', **{'rear.rate_hz': '7'}))
    assert node._settings.problems == []
    values = [node.get_parameter(f'{camera}.{what}').value for camera in ('front', 'rear') for what in ('rate_hz', 'reliability')]
    assert values == [5.0, 'reliable', 7.0, 'reliable']


def test_the_bound_on_camera_images_reaches_the_decoder_of_either_message(start, tiny_model_dir):
    node = start(*given(model=tiny_model_dir, device='cpu', cameras='[front, rear]', max_image_pixels='4095',
                        **{'rear.topic': 'rear/compressed'}))
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    for camera, message in (('front', image(1)), ('rear', jpeg(1))):
        with pytest.raises(FrameError, match='64 x 64 pixels, more than the 4095.*"max_image_pixels"'):
            node._engine.cameras[camera].decode(serialize_message(message))


# --- changes at run time ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,value', [
    ('camera.rate_hz', math.nan), ('camera.rate_hz', math.inf), ('camera.rate_hz', 0.0), ('camera.rate_hz', -1.0),
    ('camera.rate_hz', 1e-300), ('camera.rate_hz', 0.0009), ('answer_timeout_s', 1e-9), ('stale_after_s', 1e-9),
    ('max_question_chars', 2**31 - 1), ('max_tokens', 65537), ('camera.rate_hz', 1000.5), ('answer_timeout_s', math.nan),
    ('stale_after_s', math.inf), ('stale_after_s', 0.0),
    ('slice_tokens', 0), ('slice_tokens', 5000), ('evidence_frames', -1), ('max_tokens', 0), ('answer_policy', 'last(0)'),
    ('answer_policy', 'magic'), ('max_tokens', 'many')])
def test_bad_change_is_refused_with_a_reason_and_the_value_stays(node, name, value):
    before = node.get_parameter(name).value
    [result] = node.set_parameters([Parameter(name, value=value)])
    assert not result.successful and result.reason
    assert node.get_parameter(name).value == before


@pytest.mark.parametrize('name', [name for name, spec in SPECS.items() if spec.fixed])
def test_read_only_parameter_refuses_every_change(node, name):
    [result] = node.set_parameters([Parameter(name, value=SPECS[name].default)])
    assert not result.successful and 'read-only' in result.reason


def test_what_configuring_uses_may_change_while_unconfigured_and_only_then(start, tiny_model_dir):
    node = start(*given(budget='0'))
    assert node._settings.problems and node.trigger_configure() == TransitionCallbackReturn.FAILURE
    values = {'model': tiny_model_dir, 'device': 'cpu', 'budget': 32, 'cameras': ['left', 'right']}
    for name, value in values.items():
        [result] = node.set_parameters([Parameter(name, value=value)])
        assert result.successful, result.reason
    assert node._settings.problems == []
    [result] = node.set_parameters([Parameter('right.topic', value='rear/image')])
    assert result.successful and node.get_parameter('left.topic').value == 'left/image_raw'
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    assert [source.topic for source in node._inputs] == ['/left/image_raw', '/rear/image']
    for name, value in values.items():
        [result] = node.set_parameters([Parameter(name, value=value)])
        assert not result.successful and result.reason.startswith(f'{name} is'), name
        assert 'unconfigured' in result.reason and 'inactive now' in result.reason and 'cleanup' in result.reason
    assert node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
    results = node.set_parameters([Parameter('max_frame_pixels', value=10), Parameter('min_frame_pixels', value=20)])
    assert all(result.successful for result in results) and node.trigger_configure() == TransitionCallbackReturn.FAILURE
    [problem] = node._settings.problems
    assert 'min_frame_pixels must be at most' in problem


def test_valid_changes_hold_and_a_new_rate_reaches_its_camera(start, tiny_model_dir):
    node = start(*given(model=tiny_model_dir, cameras='[camera, rear]', device='cpu'))
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    samplers = {source.camera.name: source.sampler for source in node._inputs}
    for name, value in (('camera.rate_hz', 10.0), ('answer_policy', 'last(4)'), ('max_tokens', 5), ('slice_tokens', 2)):
        [result] = node.set_parameters([Parameter(name, value=value)])
        assert result.successful, result.reason
        assert node.get_parameter(name).value == value
    stamps = [10**9 + i * 10**8 for i in range(20)]
    taken = {name: sum(sampler.judge(stamp).name == 'SAMPLE' for stamp in stamps) for name, sampler in samplers.items()}
    assert taken['camera'] == 20 and taken['rear'] in (4, 5), 'ten and two images a second for two seconds'


def test_refused_value_names_its_parameter_and_default_and_no_file_that_may_not_be_in_use(node):
    with pytest.raises(ParameterError, match=r'\(parameter "budget"; its default is 4096\)') as refused:
        SPECS['budget'].verified(0)
    assert '.yaml' not in str(refused.value)


# --- names that are no parameter --------------------------------------------------------------------------------------

@pytest.mark.parametrize('cameras', ['[front]', '[front, rear]', '[camera_front]'])
def test_shipped_file_with_other_cameras_is_no_reason_to_warn(start, cameras):
    assert start('--params-file', str(YAML), *given(cameras=cameras))._settings.unknown == []


@pytest.mark.parametrize('name,meant', [
    ('frnt.topic', 'front.topic'), ('front.topc', 'front.topic'), ('camera.topc', None), ('cameras.topic', None),
    ('fronts.rate_hz', 'front.rate_hz'), ('buget', 'budget')])
def test_mistyped_names_are_told(start, name, meant):
    [sentence] = start(*given(cameras='[front, cameras1]', **{name: 'x'}))._settings.unknown
    assert f'"{name}" is not one of this node' in sentence
    assert meant is None or f'is "{meant}" meant?' in sentence


def test_block_of_a_camera_that_is_left_out_this_time_is_no_typo(start):
    assert start(*given(cameras='[front]', **{'gripper.topic': '/gripper', 'gripper.rate_hz': '1.0'}))._settings.unknown == []
