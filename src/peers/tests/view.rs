use std::sync::Arc;

use super::*;
use crate::{
    catalog::{self, Change},
    model::{Revision, Roles},
    peers::{board::Known, record::Observed},
};

/// The catalog hears of a new leader before the board does: whoever waits for what is newer must still be told.
#[test]
fn a_view_is_not_newer_than_the_leader_that_it_shows() {
    let (mut writer, reader) = catalog::catalog();
    let set = Arc::new(founded(Kind::Etcd, 3));
    let leads = |n: u64| Roles { term: n, leader: Some(key(n)), ..Roles::default() };
    let mut view = |catalog: (u64, Roles), board: (u64, Roles)| {
        let change = Change::PutRoles(set.spec.name.clone(), Arc::new(catalog.1));
        writer.apply(Revision(catalog.0), vec![change]);
        let observed = Observed { roles: board.1, revision: Revision(board.0), ..Observed::default() };
        let known = Known { set: Arc::clone(&set), observed: Arc::new(observed) };
        let view = View::new(&known, &reader.latest(), None);
        (view.revision.0, view.roles.term)
    };
    assert_eq!(view((5, leads(1)), (5, leads(1))), (5, 1));
    assert_eq!(view((7, leads(2)), (5, leads(1))), (5, 1), "the catalog is ahead");
    assert_eq!(view((7, leads(2)), (7, leads(2))), (7, 2));
    assert_eq!(view((7, leads(2)), (9, leads(3))), (9, 3), "the board is ahead");
}
