"""The arguments of config files: commas separate them, but paths may have commas."""

import pytest

from configs import common
from paligemma_med.config import arguments

KNOWN, TEXTS = ["res", "init", "tiny", "stage1"], ["init", "stage1"]


@pytest.mark.parametrize(
    "text, pairs",
    [
        ("", []),
        ("res=448,tiny", [("res", "448"), ("tiny", None)]),
        ("res=3,", [("res", "3")]),
        ("tiny=True,init=/x/My Models, v2/b.npz", [("tiny", "True"), ("init", "/x/My Models, v2/b.npz")]),
        ("init=/a,b/c.npz,res=448", [("init", "/a,b/c.npz"), ("res", "448")]),
        ('init="/a,res=3/x",res=4', [("init", "/a,res=3/x"), ("res", "4")]),
        ("init='/a,b',tiny", [("init", "/a,b"), ("tiny", None)]),
        ("init=/it's, ok/b.npz,res=3", [("init", "/it's, ok/b.npz"), ("res", "3")]),
        ("init=/a,smaplse=3", [("init", "/a"), ("smaplse", "3")]),
        ("init=/a,tiny", [("init", "/a"), ("tiny", None)]),
        ("res=4,/x", [("res", "4"), ("/x", None)]),
    ],
)
def test_pieces(text, pairs):
    assert arguments.split(text, KNOWN, TEXTS) == pairs


def test_a_config_takes_a_path_with_commas():
    args = common.parse_arg("tiny=True,init=/x/My Models, v2/b.npz,res=8", init="", res=448, tiny=False)
    assert (args.init, args.res, args.tiny) == ("/x/My Models, v2/b.npz", 8, True)
    with pytest.raises(ValueError, match="'smaple' is unknown; .* A path with commas stands in quotes"):
        common.parse_arg("init=/x,smaple", init="")
