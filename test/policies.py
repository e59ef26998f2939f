"""The shipped SROS2 policies, and what a node of the graph has to be held against them."""
from fnmatch import fnmatchcase
from pathlib import Path
from xml.etree import ElementTree

FOLDER = Path(__file__).resolve().parents[1] / 'config/security'
# What a policy names though not every run has it.
SOMETIMES = {'/clock', '/odom', '/tf', '/tf_static', '/bond', '/*/image_raw', '/*/image_raw/compressed'}
_ACTION_SERVICES = ('send_goal', 'cancel_goal', 'get_result')


class Policy:
    """Of one file.

    Attributes:
        enclave: its path; node: full name of its node.
        allowed: by 'publish', 'subscribe', 'reply' and 'request', full names as `names_of` has them; actions taken apart.
    """

    def __init__(self, name: str):
        root = ElementTree.parse(FOLDER / f'{name}.policy.xml').getroot()
        (enclave,), (profile,) = root.iter('enclave'), root.iter('profile')
        self.enclave, self.node = enclave.get('path'), f'{profile.get("ns").rstrip("/")}/{profile.get("node")}'
        self.allowed: dict[str, set[str]] = {way: set() for way in ('publish', 'subscribe', 'reply', 'request')}
        for listed in profile:
            for way, rule in listed.items():
                assert rule == 'ALLOW', f'{name}: all that is not allowed is denied'
                for entry in listed:
                    self._allow(listed.tag, way, entry.text.replace('~', self.node, 1))

    def refuses(self, have: dict[str, set[str]]) -> list[str]:
        """What a node has and the policy does not allow."""
        return [f'{way} {name}' for way, names in have.items() for name in sorted(names)
                if not any(fnmatchcase(name, allowed) for allowed in self.allowed[way])]

    def misses(self, have: dict[str, set[str]]) -> list[str]:
        """What the policy allows and a node has not, but for what it has only sometimes. The status of an action is part of being
        allowed to call it, whether the caller listens to it or not."""
        return [f'{way} {name}' for way, names in self.allowed.items() for name in sorted(names - have[way] - SOMETIMES)
                if (way, name.rpartition('/')[2]) != ('subscribe', 'status')]

    def _allow(self, kind: str, way: str, name: str) -> None:
        assert name.startswith('/'), f'{name}: policies name things in full, or by ~'
        if kind != 'actions':
            self.allowed[way].add(name)
            return
        services, topics = ('reply', 'publish') if way == 'execute' else ('request', 'subscribe')
        self.allowed[services] |= {f'{name}/_action/{service}' for service in _ACTION_SERVICES}
        self.allowed[topics] |= {f'{name}/_action/{topic}' for topic in ('feedback', 'status')}


def names_of(node, name: str) -> dict[str, set[str]]:
    """What a node of namespace / has, as another node of the graph sees it."""
    ways = {'publish': node.get_publisher_names_and_types_by_node, 'subscribe': node.get_subscriber_names_and_types_by_node,
            'reply': node.get_service_names_and_types_by_node, 'request': node.get_client_names_and_types_by_node}
    return {way: {found for found, _ in of(name, '/')} for way, of in ways.items()}
