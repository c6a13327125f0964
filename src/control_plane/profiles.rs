//! Security profiles: which classes a level of trust allows, the best one first. Pure.
//!
//! *Scope*: the three built-in profiles. *Not here*: which node offers a class ([`super::scheduler`]).
//!
//! Invariant: a workload that names a class outside its profile is refused, never quietly moved.

use crate::workload::{Draft, Name};

/// What a level of trust allows.
#[derive(Debug)]
struct Profile {
    name: &'static str,
    /// In order of preference.
    classes: &'static [&'static str],
    /// Only a class whose sandboxes have their own kernel will do.
    own_kernel: bool,
}

const BUILT_IN: [Profile; 3] = [
    Profile { name: "untrusted", classes: &["edera-zone", "kata"], own_kernel: true },
    Profile { name: "multi_tenant", classes: &["edera-zone", "kata", "gvisor"], own_kernel: false },
    Profile { name: "internal", classes: &["gvisor", "native"], own_kernel: false },
];

/// The classes a workload may run under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// In order of preference; never empty.
    pub(super) classes: Vec<Name>,
    /// Whether the class must promise its sandboxes their own kernel.
    pub(super) own_kernel: bool,
}

/// Why there is no choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Denial {
    /// The class is none of those the profile allows.
    ClassNotAllowed {
        /// The profile.
        profile: &'static str,
        /// What it allows.
        allowed: String,
    },
    /// Neither a class nor a profile is named.
    NothingNamed,
    /// There is no such profile; these there are.
    UnknownProfile(String),
}

/// The classes that a draft allows.
///
/// # Errors
/// [`Denial`]
pub(super) fn choose(draft: &Draft) -> Result<Choice, Denial> {
    let class = draft.runtime_class.as_ref();
    let Some(profile) = &draft.security_profile else {
        let class = class.ok_or(Denial::NothingNamed)?;
        return Ok(Choice { classes: vec![class.clone()], own_kernel: false });
    };
    let profile = BUILT_IN.iter().find(|p| is_named(p, profile)).ok_or_else(|| {
        let names: Vec<&str> = BUILT_IN.iter().map(|p| p.name).collect();
        Denial::UnknownProfile(names.join(", "))
    })?;
    let allowed = profile.classes.iter().filter_map(|class| Name::new(class).ok());
    let classes: Vec<Name> = allowed.filter(|allowed| class.is_none_or(|class| class == allowed)).collect();
    if classes.is_empty() {
        return Err(Denial::ClassNotAllowed { profile: profile.name, allowed: profile.classes.join(", ") });
    }
    Ok(Choice { classes, own_kernel: profile.own_kernel })
}

/// `multi-tenant` is `multi_tenant`: a name may be written either way.
fn is_named(profile: &Profile, name: &Name) -> bool {
    profile.name == name.as_str().replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::super::store::tests::draft;
    use super::*;

    #[test]
    fn profiles_choose_allow_and_refuse() {
        let check = |fields: &str, expect: Result<&[&str], Denial>| {
            let choice = choose(&draft(&format!(r#"{{"image":"a"{fields}}}"#)));
            let classes = choice.map(|c| c.classes.iter().map(|c| c.as_str().to_owned()).collect::<Vec<_>>());
            assert_eq!(classes, expect.map(|e| e.iter().map(|c| (*c).to_owned()).collect()), "{fields}");
        };
        check("", Err(Denial::NothingNamed));
        check(r#","runtime_class":"anything""#, Ok(&["anything"]));
        check(r#","security_profile":"untrusted""#, Ok(&["edera-zone", "kata"]));
        check(r#","security_profile":"multi-tenant""#, Ok(&["edera-zone", "kata", "gvisor"]));
        check(r#","security_profile":"internal","runtime_class":"native""#, Ok(&["native"]));
        check(
            r#","security_profile":"untrusted","runtime_class":"native""#,
            Err(Denial::ClassNotAllowed { profile: "untrusted", allowed: "edera-zone, kata".into() }),
        );
        check(r#","security_profile":"trusted""#, Err(Denial::UnknownProfile("untrusted, multi_tenant, internal".into())));
    }

    #[test]
    fn only_the_untrusted_must_have_their_own_kernel() {
        let own_kernel =
            |profile: &str| choose(&draft(&format!(r#"{{"image":"a","security_profile":"{profile}"}}"#))).map(|c| c.own_kernel);
        assert_eq!(own_kernel("untrusted"), Ok(true));
        assert_eq!(own_kernel("internal"), Ok(false));
    }
}
