"""Asks to say words: how the tiny base learns to read and to spell, whatever the picture shows.

PaliGemma's language model knows the words of radiology before it sees a radiograph; a base that has
never written them spends most of a short adaptation on spelling. So everyday words and radiology's
are here alike, to be said after the question and never about a picture: what an infarct looks like
is left to the adaptation.
"""

from collections.abc import Iterator

import numpy as np

from data_prep.datasets.drawn.questions import Question

WORDS_ASKED = 6  # of a picture
WORDS = """
    apple arm baby bag ball bank bed bell belong bird boat body book bottle box bread bridge brush
    bus cake car cat chair church city clock cloud coat coffee corner cup dance day desk dinner
    doctor dog door dress drink ear east egg evening eye family farm field fire fish floor flower
    foot forest friend fruit game garden girl glass hair hand hat hill horse hour house ice island
    key king kitchen knife lake lamp leaf letter light line lion man map market meal metal method
    milk minute mirror money moon morning mountain mouth music name neck night north nose ocean
    office page paint paper part party people pencil picture place plant plate river road room rose
    salt school sea season shirt shoe shop show sister sky snow song south spoon spring star stone
    store street sugar summer sun table tail tea teacher ticket time town train tree wall watch
    water weather west wheel wind window winter woman wood word work year

    abdomen abdominal abnormal abnormality abnormalities abscess air aneurysm angiography aorta
    artery asymmetry atelectasis atrophy axial bladder bleeding blood bone bowel brain breast
    bronchus calcification cancer cardiomegaly cavity chest colon consolidation contrast coronal
    cortex CT cyst dense diaphragm dilatation disease edema effusion embolism emphysema enlarged
    fibrosis film finding fluid fracture frontal gallbladder gland head healthy heart hematoma
    hemorrhage hernia hilum image imaging infarct infection inflammation intestine kidney lateral
    lesion level liver lobe lung lymph marrow mass modality MRI muscle nerve nodule normal opacity
    organ pancreas patient pelvis PET pleura pneumonia pneumothorax position prostate pulmonary
    radiograph rectum region rib sagittal scan scar side skin skull slice spine spleen stomach
    stroke swelling symptom tendon thorax thyroid tissue trachea tuberculosis tumor ulcer
    ultrasound upper urine uterus vein ventricle vertebra vessel view X-Ray
""".split()


def words(rng: np.random.Generator) -> Iterator[Question]:
    """Yields questions that ask for a word: "Say chest": "Chest".

    Their answers can't be counted out, since each question has but one.
    """
    for word in rng.choice(WORDS, WORDS_ASKED, replace=False).tolist():
        yield Question(f"Say {word}", word[0].upper() + word[1:], (), "Words")
