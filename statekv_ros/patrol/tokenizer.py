"""The patrol model's tokenizer: the words of its world, whole numbers, and letters, so that no question is unreadable."""
import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from statekv_ros.patrol.captions import PROMPT
from statekv_ros.patrol.questions import KINDS, Question
from statekv_ros.patrol.world import COLOURS, PLURALS, SHAPES

SPECIAL_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>',
                  '<|video_pad|>', '<unk>')
# A timestamp '<12.2 seconds>' is '<', '12', '.2 seconds>'.
_PIECES = r'\.\d seconds>|\d+|[a-z]+|\n|[^\sa-z0-9]'
_CHAT = 'system user assistant you are a helpful robot the'.split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over the world's words; numbers are pairs of digits: '1234' is '12', '##34'. Text is read in lower case."""
    splitter = pre_tokenizers.Split(Regex(_PIECES), behavior='removed', invert=True)
    sentences = [Question(kind, (0, 0)).text for kind in KINDS] + [PROMPT]
    words = [piece for sentence in sentences for piece, _ in splitter.pre_tokenize_str(sentence)]
    answers = ['yes', 'no', 'nothing', 'door', ',', '.', '\n', *COLOURS, *SHAPES, *PLURALS]
    fractions = [f'.{tenth} seconds>' for tenth in range(10)]
    numbers = [str(n) for n in range(100)] + [f'##{n}' for n in range(100)] + [f'##0{n}' for n in range(10)]
    letters = [*string.punctuation, *string.ascii_lowercase, *(f'##{c}' for c in string.ascii_lowercase)]
    tokens = dict.fromkeys([*SPECIAL_TOKENS, *_CHAT, *answers, *words, *fractions, *numbers, *letters])
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token='<unk>'))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece(prefix='##', cleanup=False)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>',
                                   unk_token='<unk>')
