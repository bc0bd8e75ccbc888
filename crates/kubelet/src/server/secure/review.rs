//! The API server as the authority: it knows who tokens belong to and what users may do.

use std::collections::BTreeMap;

use async_trait::async_trait;
use cluster::api::Api;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};

use super::{Access, Authority, AuthorityError, User};

#[async_trait]
impl Authority for Api {
    async fn user_of(&self, token: &str) -> Result<Option<User>, AuthorityError> {
        let spec = TokenReviewSpec { token: token.to_owned(), ..TokenReviewSpec::default() };
        let review = TokenReview { spec, ..TokenReview::default() };
        let review = self.review_token(&review).await.map_err(|error| AuthorityError(error.to_string()))?;
        let status = review.status.unwrap_or_default();
        let user = status.user.filter(|_| status.authenticated == Some(true));
        Ok(user.map(|user| User {
            name: user.username.unwrap_or_default(),
            uid: user.uid,
            groups: user.groups.unwrap_or_default(),
            extra: user.extra.unwrap_or_default().into_iter().collect(),
        }))
    }

    async fn allows(&self, user: &User, access: &Access) -> Result<bool, AuthorityError> {
        let attributes = ResourceAttributes {
            verb: Some(access.verb.to_owned()),
            version: Some("v1".to_owned()),
            resource: Some("nodes".to_owned()),
            subresource: Some(access.subresource.to_owned()),
            name: Some(access.node.clone()),
            ..ResourceAttributes::default()
        };
        let extra: BTreeMap<String, Vec<String>> = user.extra.iter().cloned().collect();
        let spec = SubjectAccessReviewSpec {
            user: Some(user.name.clone()),
            uid: user.uid.clone(),
            groups: Some(user.groups.clone()),
            extra: Some(extra),
            resource_attributes: Some(attributes),
            ..SubjectAccessReviewSpec::default()
        };
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let review = self.review_access(&review).await.map_err(|error| AuthorityError(error.to_string()))?;
        Ok(review.status.is_some_and(|status| status.allowed && status.denied != Some(true)))
    }
}
