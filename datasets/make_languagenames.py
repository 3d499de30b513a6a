"""Make languagenames.tar from the surname lists of faker (MIT): the same bytes on each run.

pip install -e .[datasets] && python datasets/make_languagenames.py
"""

import importlib
import io
import re
import tarfile
from pathlib import Path

from unidecode import unidecode

ARCHIVE = Path(__file__).parent / "languagenames.tar"
LOCALES = {
    "Arabic": ["ar_AA", "ar_DZ", "ar_PS", "ar_SA"],
    "Armenian": ["hy_AM"],
    "Chinese": ["zh_CN", "zh_TW"],
    "Croatian": ["hr_HR"],
    "Czech": ["cs_CZ"],
    "Dutch": ["nl_BE", "nl_NL"],
    "English": ["en_GB", "en_US"],
    "Finnish": ["fi_FI"],
    "French": ["fr_CA", "fr_FR"],
    "Georgian": ["ka_GE"],
    "German": ["de_AT", "de_DE"],
    "Greek": ["el_GR"],
    "Hebrew": ["he_IL"],
    "Irish": ["en_IE", "ga_IE"],
    "Italian": ["it_IT"],
    "Polish": ["pl_PL"],
    "Portuguese": ["pt_BR", "pt_PT"],
    "Russian": ["ru_RU"],
    "Slovak": ["sk_SK"],
    "Spanish": ["es_ES"],
    "Swedish": ["sv_SE"],
    "Tamil": ["ta_IN"],
    "Ukrainian": ["uk_UA"],
}
SURNAMES = re.compile(r"(.*_)?last_(romanized_)?names(_.*)?")


def latin(name: str) -> str:
    """One word of Latin letters, so that neither script nor punctuation gives the answer away.

    >>> latin("Kovářová"), latin("O'Brien"), latin("van der Berg")
    ('Kovarova', 'Obrien', 'Vanderberg')
    """
    return re.sub("[^a-z]", "", unidecode(name).lower()).capitalize()


def surnames(locale: str) -> set[str]:
    """The locale's surnames; an entry of its lists may be a (name, reading) pair."""
    provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
    entries: set[str] = set()
    for attribute in filter(SURNAMES.fullmatch, vars(provider)):
        entries.update(e if isinstance(e, str) else e[0] for e in getattr(provider, attribute))
    return {name for name in map(latin, entries) if len(name) > 1}


def main() -> None:
    with tarfile.open(ARCHIVE, "w", format=tarfile.USTAR_FORMAT) as archive:
        for nationality, locales in sorted(LOCALES.items()):
            names = sorted(set().union(*map(surnames, locales)))
            content = ("\n".join(names) + "\n").encode()
            member = tarfile.TarInfo(f"{nationality}.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
            print(f"{nationality:12} {len(names):6}")


if __name__ == "__main__":
    main()
